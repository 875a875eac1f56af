"""Why a request took as long as it did: `fold` keeps what happened, `told` makes an explanation of it for one viewer,
`words` says it in English. Without a clock and without I/O, so a simulation explains itself the same way.
"""
