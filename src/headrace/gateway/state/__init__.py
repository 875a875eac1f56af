"""What outlives the process: files, batches and responses, in one SQLite database under the state directory."""
