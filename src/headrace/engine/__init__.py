"""Decides for one replica. Pure: events and views in, plans out; `now` is an argument."""
