"""`python -m apt_train`, and so `torchrun ... -m apt_train`: the command apt-train."""

import sys

from apt_train.cli import main

sys.exit(main())
