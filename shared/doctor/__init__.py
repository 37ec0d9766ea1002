"""`tandem doctor`: what of this host, its container, its GPUs and a running cluster keeps Tandem from serving well.

examination.py runs every check; finding.py is what they say. What mends a finding stands in remedies.py, and the
settings of a container that remedies quote in compose.py. Nothing here loads torch.
"""
