"""Ids of users and groups, as AFS's protection server gives them: positive for users, negative for groups."""

ANONYMOUS = 32766
"""The user that everybody without a token is."""
ANYUSER = -101
"""system:anyuser: everybody."""
AUTHUSER = -102
"""system:authuser: everybody with a token."""
ADMINISTRATORS = -204
"""system:administrators."""
