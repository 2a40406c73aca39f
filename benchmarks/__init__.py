"""Speed, measured beside a physical limit or a peer in the same run."""

import apt_serve as apt_serve  # before torch: it tells OpenMP how to wait
