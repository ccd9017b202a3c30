"""Speed and memory beside the peers: the same weights and inputs, in one process, turn by turn."""
