"""Hosts: how each library's attention is found, patched and clocked."""
