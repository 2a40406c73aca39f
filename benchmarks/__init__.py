"""Speed, measured beside a physical limit or a peer in the same run."""
