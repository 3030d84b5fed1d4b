"""MicroWorld: a small rendered world whose truth is known, with real inputs beside it."""
