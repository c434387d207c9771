"""The ops: schemas, public functions, gradients, reference implementation, and the choice of a backend at run time."""
