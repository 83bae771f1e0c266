"""sandbox/isolation"""
