"""``python -m npu_zoo`` is ``npu-zoo``."""

import sys

from npu_zoo.cli import main

sys.exit(main())
