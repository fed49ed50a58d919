"""The fast sweep: compute only what an edit changes, and what it makes alike only once.

``rule`` says what may be reused and shared; ``segments`` lays sequences out for it; ``programs`` holds the compiled
functions; ``engine`` runs a block of questions; ``budget`` plans memory; ``keys`` keeps shared keys and values.
"""
