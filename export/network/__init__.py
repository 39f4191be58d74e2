"""A network as TensorRT parsed it, computed layer by layer in numpy on this CPU.

TensorRT itself runs on a GPU only. What its parser made of a model can be computed without one: a layer that was read
with another attribute, as another function, or not at all then shows in numbers. Kernels and fusions do not.

A layer computes numbers of 16 bits in float32 and rounds its outputs to their type; integers are exact. A layer or an
attribute that is not known here is an error that names it.
"""
