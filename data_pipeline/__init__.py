"""Trajectories in, packed batches out: schema, encoder, shards, input pipeline. Imports neither JAX nor jaxprm."""
