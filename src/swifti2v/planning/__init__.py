"""The cost of a clip before it is made: FLOP, bytes, memory and seconds, and the plan that fits."""
