#!/usr/bin/env python
import sys

from ops import commandline

if __name__ == "__main__":
    commandline.main(sys.argv)
