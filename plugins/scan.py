"""What function bodies that go token by token share."""


def by_token(name: str, source: str, axis: str) -> str:
    """Makes NAME_by_token of `source` [B, T, H, D]: [T, B, H, D] and one dimension more at `axis`."""
    return f"""
    {name}_first = Transpose <perm = [1, 0, 2, 3]> ({source})
    {name}_by_token = Unsqueeze ({name}_first, {axis})"""
