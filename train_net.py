#!/usr/bin/env python3
"""
Train or evaluate, see `oln_d2/train_net.py`; where the package is installed, `-m oln_d2.train_net`.
"""

from oln_d2.train_net import run

if __name__ == "__main__":
    run()
