def guard_type(wait: bool = False) -> object:
    return None
