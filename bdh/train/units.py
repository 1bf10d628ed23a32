"""Sizes and times for people."""


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.3f} GB"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"
