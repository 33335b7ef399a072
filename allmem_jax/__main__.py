"""`python -m allmem_jax`, the same as `allmem`."""

import sys

from allmem_jax import cli

sys.exit(cli.main())
