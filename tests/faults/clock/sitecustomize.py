"""Imported by the interpreter of a worker whose clock is to be wrong."""

import os
import time

import time_machine

time_machine.travel(time.time() + float(os.environ["FAULTS_CLOCK_OFFSET"]), tick=True).start()
