"""`trireme report`: the logbook of a run as one self-contained page.

sources   where it is read from: a cluster, or a directory of `trireme run`
thin      shortens a step log; runs inside a training pod, so it needs the standard library alone
steplog   its rows, attempts and events
story     what a page tells, without a word of HTML
charts    figures as SVG and text
page      the page
"""
