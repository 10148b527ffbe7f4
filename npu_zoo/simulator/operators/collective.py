"""collective"""
