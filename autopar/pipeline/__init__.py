"""Pipelines as plain data: tables of actions, what makes them, checks and simulates them, and the cutting of programs.

table      Action, Row, Table: a schedule as text that can be printed, saved, read and edited
schedules  the known schedules, as functions of integers
comms      sends and receives put in, without deadlock
checks     whether a table is one that can run, and why not
clock      a table in time: seconds of every action, utilisation, what is in flight
draw       a timeline as SVG, or for Perfetto
"""
