"""The torch surface for plugin authors: what models are made of.

Layers are in its modules (``linear``, ``norm``, ``rotary``, ``decoder`` …); importing the package itself
imports no torch.
"""
