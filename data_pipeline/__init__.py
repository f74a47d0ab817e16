"""Trajectories in, packed batches out: schema, encoder, shards, input pipeline. Imports neither JAX nor jaxprm."""

from data_pipeline import quiet

# Before TensorFlow is imported, which reads the environment once.
quiet.silence()
