"""Applications of the library: installed as ``fastinvdpo._examples``, and run by ``fastinvdpo demo``."""
