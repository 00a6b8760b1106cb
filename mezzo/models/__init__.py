"""Networks of mezzo's own: plain and idiomatic, one file per framework; their shapes and costs in one place.

Nothing is imported here, so that `mezzo.models.shapes` can be used without any framework installed.
"""
