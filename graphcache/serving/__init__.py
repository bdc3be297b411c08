"""Serving: the Open Inference Protocol, a repository of models, and a deployment on Ray Serve.

Needs the extra ``ray``, but for the tensors' side of the protocol.
"""
