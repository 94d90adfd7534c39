"""VBench-I2V: its suite, our ``lite`` dimensions, a way to the official code, and the scores.

Source: Huang et al., "VBench++", arXiv:2411.13503; github.com/Vchitect/VBench at the commit named in
``official``.
"""
