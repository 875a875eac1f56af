"""Headrace serves large language models on the hardware you have, and says what it would do on hardware you don't.

The rooms: `core` holds the words, `engine` decides for one replica, `device` computes, `gateway` speaks to clients,
`bench` measures any server. `cli` is the door that assembles them. `docs/design.md` has the map.
"""

__version__ = "0.1.0"
