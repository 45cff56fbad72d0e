"""``python -m memopt``: see ``memopt.cli``."""

from memopt.cli import main

raise SystemExit(main())
