"""What the environment says about the faults; see conftest.py."""

import os
import secrets

SEED = int(os.environ.get("FAULTS_SEED") or secrets.randbelow(1_000_000))
DATABASE = os.environ.get("FAULTS_DATABASE") or (
    "postgresql" if os.environ.get("DATABASE_URL", "").startswith("postgres") else "sqlite"
)
# The whole matrix, instead of one scenario of each kind.
ALL = os.environ.get("FAULTS_ALL", "") == "true"
# Of these kinds only, where some are named.
KINDS = os.environ.get("FAULTS_KINDS", "").split()
RUNS = int(os.environ.get("FAULTS_RUNS") or 300)
