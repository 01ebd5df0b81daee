"""Runs a lowered plan: process groups, agreement between ranks, sharded parameters, and the compiled module itself.

The only folder that imports torch.distributed.
"""
