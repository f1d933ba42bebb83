"""What one forward did, and what its dataflow says about the weights."""
