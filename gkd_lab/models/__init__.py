"""Models of both families: build, load, shard, read logits, and pack many cells into one model.

`forward` and `heads` run a model, `packing` packs K students into one, `rng` has the keyed random streams and
the on-policy coin.
"""
