"""Messages as agents have them, converted to the messages of a trajectory."""
