"""`python -m bdh` is `bdh`; `torchrun -m bdh` starts it on several processes."""

import sys

from bdh.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
