"""APT's ops: tensor in, tensor out. `ops` is the public face; backends are chosen by device."""
