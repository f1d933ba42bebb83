"""`python -m lora2fx` is the command `lora2fx`."""

import sys

from lora2fx.cli import main

sys.exit(main())
