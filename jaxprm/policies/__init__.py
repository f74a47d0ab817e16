"""What proposes actions, and whole episodes sampled from it."""
