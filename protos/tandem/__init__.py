"""Stubs generated from Tandem's protobuf contracts."""
