"""What would stop a run, found before any rank starts.

Reading order: doctor (the machine), cluster_check (the nodes together), epochs (how many steps they are).
"""
