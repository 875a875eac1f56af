"""The rooms of the policies. Import their names from `headrace.engine.policy`."""
