"""The nano world: scenes, oracles and small real weights, so that the whole pipeline runs on a laptop."""
