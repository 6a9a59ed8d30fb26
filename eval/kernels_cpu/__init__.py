"""How near do the CPU's products with one row come to the memory's bandwidth?"""
