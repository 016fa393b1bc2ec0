"""What a model is and costs: parameters, operations, bytes, statistics of its weights, speed; and reports of them."""
