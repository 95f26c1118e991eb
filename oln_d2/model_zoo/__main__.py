"""Says what took the place of `python -m oln_d2.model_zoo`."""

import sys

sys.exit("MODEL_ZOO.md is made by: python tools/make_model_zoo.py > MODEL_ZOO.md")
