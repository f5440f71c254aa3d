"""`job plan`: what a sweep will do, need and cost, tried as far as is possible without a GPU."""
