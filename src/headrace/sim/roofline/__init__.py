"""How fast this machine could run this model, how fast it does, and where the difference goes."""
