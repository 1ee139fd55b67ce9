"""What each verb of the command line does: one file a verb.

Imports everything; nothing but `cli` imports it.
"""
